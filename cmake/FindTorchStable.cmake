# PyTorch's stable C++ ABI as target TorchStable: headers and libraries of the torch that Python finds, and nothing
# else (find_package(Torch) drags in CUDA detection). Use: find_package(TorchStable 2.11 REQUIRED).
find_package(Python3 REQUIRED COMPONENTS Interpreter)
# Second with -I: pip hides the environment's packages from an isolated build by PYTHONPATH, which -I ignores.
foreach(option "" -I)
  execute_process(
    COMMAND
      ${Python3_EXECUTABLE} ${option} -c
      "import importlib.util, importlib.metadata as m; s = importlib.util.find_spec('torch'); print((m.version('torch').split('+')[0] + ';' + s.submodule_search_locations[0]) if s else '', end='')"
    OUTPUT_VARIABLE torch_found)
  if(torch_found)
    break()
  endif()
endforeach()
if(torch_found)
  list(GET torch_found 0 TorchStable_VERSION)
  list(GET torch_found 1 TorchStable_ROOT)
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  TorchStable
  REQUIRED_VARS TorchStable_ROOT
  VERSION_VAR TorchStable_VERSION
  REASON_FAILURE_MESSAGE "${Python3_EXECUTABLE} sees no torch. If your environment has one, the build is isolated from it: pip install scikit-build-core, then pip install --no-build-isolation . Otherwise: pip install 'torch>=${TorchStable_FIND_VERSION}' first, or set Python3_EXECUTABLE.")

if(TorchStable_FOUND AND NOT TARGET TorchStable)
  add_library(TorchStable INTERFACE)
  target_include_directories(TorchStable SYSTEM INTERFACE ${TorchStable_ROOT}/include)
  target_link_directories(TorchStable INTERFACE ${TorchStable_ROOT}/lib)
  # No run path: Python imports torch before it loads a library of ours.
  target_link_libraries(TorchStable INTERFACE torch_cpu c10 torch)
  # 2.11: an API that came later fails at compile time, any later PyTorch loads the result.
  target_compile_definitions(TorchStable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
endif()
