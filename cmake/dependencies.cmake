# What the library is built from, installed packages first, else pinned sources (docs/dependencies.md):
#   hwy::hwy              SIMD with run-time dispatch
#   fmt::fmt-header-only  messages; header-only, so that no process meets two fmt libraries
# cmake/packages finds the same packages, for tools/set_up.sh.
include(FetchContent)
# One for all build folders. What is built from it stays in each: compilers and flags differ.
set(DILATED_DOWNLOADS ${PROJECT_SOURCE_DIR}/build/downloads CACHE PATH "Where pinned sources are kept")

# The settings below and in tests/ reach dependencies whose own CMake files are older than these policies.
set(CMAKE_POLICY_DEFAULT_CMP0077 NEW)
set(CMAKE_POLICY_VERSION_MINIMUM 3.5)

# dilated_dependency(name hash [PACKAGE words of find_package...] [SOURCE_SUBDIR folder] URLS url mirror...)
function(dilated_dependency name hash)
  cmake_parse_arguments(PARSE_ARGV 2 arg "" "SOURCE_SUBDIR" "PACKAGE;URLS")
  set(subdir)
  if(arg_SOURCE_SUBDIR)
    set(subdir SOURCE_SUBDIR ${arg_SOURCE_SUBDIR})
  endif()
  set(find_first)
  if(arg_PACKAGE)
    set(find_first FIND_PACKAGE_ARGS ${arg_PACKAGE})
  endif()
  FetchContent_Declare(
    ${name}
    SYSTEM
    URL ${arg_URLS}
    URL_HASH SHA256=${hash}
    DOWNLOAD_DIR ${DILATED_DOWNLOADS}/${name}
    DOWNLOAD_EXTRACT_TIMESTAMP FALSE
    TIMEOUT 300
    INACTIVITY_TIMEOUT 30
    ${subdir}
    ${find_first})
endfunction()

if(DILATED_STATIC_HIGHWAY)
  set(hwy_package)
else()
  set(hwy_package PACKAGE 1.0.3)
endif()
dilated_dependency(
  hwy 566fc77315878473d9a6bd815f7de78c73734acdcb745c3dde8579560ac5440e
  ${hwy_package}
  SOURCE_SUBDIR no_cmake # its own CMake files would fetch and build its tests
  URLS https://github.com/google/highway/archive/refs/tags/1.0.3.tar.gz)
dilated_dependency(
  fmt 1250e4cc58bf06ee631567523f48848dc4596133e163f02615c97f78bab6c811
  PACKAGE 9
  URLS https://github.com/fmtlib/fmt/archive/refs/tags/10.2.1.tar.gz)
FetchContent_MakeAvailable(hwy fmt)

if(TARGET hwy::hwy)
  set(DILATED_OWN_HIGHWAY OFF)
  # Found where the loader does not look (conda, a prefix of one's own): what we install names the folder.
  get_target_property(hwy_library hwy::hwy LOCATION)
  cmake_path(GET hwy_library PARENT_PATH hwy_folder)
  if(hwy_library MATCHES "\\.(so|dylib)" AND NOT hwy_folder IN_LIST CMAKE_CXX_IMPLICIT_LINK_DIRECTORIES)
    list(APPEND CMAKE_INSTALL_RPATH ${hwy_folder})
  endif()
else()
  set(DILATED_OWN_HIGHWAY ON)
  set(hwy_VERSION 1.0.3)
  set(hwy_sources aligned_allocator.cc per_target.cc print.cc targets.cc)
  list(TRANSFORM hwy_sources PREPEND ${hwy_SOURCE_DIR}/hwy/)
  add_library(hwy STATIC ${hwy_sources})
  add_library(hwy::hwy ALIAS hwy)
  target_include_directories(hwy SYSTEM PUBLIC $<BUILD_INTERFACE:${hwy_SOURCE_DIR}>)
endif()
find_package(Threads REQUIRED)
