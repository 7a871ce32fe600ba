# DILATED_SANITIZE=address,undefined | thread: for every target, dependencies built from source included.
if(DILATED_SANITIZE)
  add_compile_options(-fsanitize=${DILATED_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g1)
  add_link_options(-fsanitize=${DILATED_SANITIZE})
endif()
