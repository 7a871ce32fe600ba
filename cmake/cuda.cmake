# CUDA, if DILATED_CUDA is ON: the language, and what every target with CUDA sources needs.
if(NOT DILATED_CUDA)
  return()
endif()

# 8.0 serves 8.6 and 8.9 too, the PTX of 9.0 whatever is newer. 90a is for kernels of its own; the others have
# nothing of it and are compiled for 90.
set(DILATED_CUDA_ARCHITECTURES 80-real 90a-real 90-virtual
    CACHE STRING "CUDA architectures, as CMAKE_CUDA_ARCHITECTURES names them")
list(TRANSFORM DILATED_CUDA_ARCHITECTURES REPLACE "90a" "90" OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
list(REMOVE_DUPLICATES CMAKE_CUDA_ARCHITECTURES)
if(DILATED_CCACHE AND PROJECT_IS_TOP_LEVEL AND NOT DEFINED CMAKE_CUDA_COMPILER_LAUNCHER)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${DILATED_CCACHE})
endif()
enable_language(CUDA)
# CMake before 3.25.2 does not know nvcc's C++20 flag ("requires the language dialect CUDA20"). A global
# CMAKE_CUDA_STANDARD would break its compiler check: set the property of each target instead.
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
  list(APPEND CMAKE_CUDA_COMPILE_FEATURES cuda_std_20)
endif()

# dilated_cuda(target): constexpr functions of ours are device functions too; the run time is linked statically, so
# that the library loads where no CUDA is.
function(dilated_cuda target)
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr>)
  target_include_directories(${target} SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  set_target_properties(${target} PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF
                                             CUDA_RUNTIME_LIBRARY Static)
endfunction()
