# CUDA sources, if DILATED_CUDA is ON. No CUDA back end exists yet: what is compiled
# is a probe, which shows that the toolchain takes our C++20 and that geometry.h is device code.
if(NOT DILATED_CUDA)
  return()
endif()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80 90a-real)
endif()
enable_language(CUDA)
# CMake before 3.25.2 does not know nvcc's C++20 flag ("requires the language dialect CUDA20"). A global
# CMAKE_CUDA_STANDARD would break its compiler check: set the property of each target instead.
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
  list(APPEND CMAKE_CUDA_COMPILE_FEATURES cuda_std_20)
endif()

add_library(dilated_cuda_probe OBJECT ${PROJECT_SOURCE_DIR}/src/kernels/cuda/probe.cu)
target_include_directories(dilated_cuda_probe PRIVATE ${PROJECT_SOURCE_DIR} ${PROJECT_SOURCE_DIR}/include)
target_compile_options(dilated_cuda_probe PRIVATE --expt-relaxed-constexpr)
set_target_properties(dilated_cuda_probe PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF)
