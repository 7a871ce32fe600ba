# dilated_warnings(target): the warnings every C++ file of ours is free of. Third-party headers are SYSTEM.
function(dilated_warnings target)
  target_compile_options(
    ${target} PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic;-Wconversion;-Wshadow>"
                      "$<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${DILATED_WERROR}>>:-Werror>")
endfunction()
