# `cmake --install` for C++ users: headers, the static library, find_package(dilated CONFIG).
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/dilated)
install(
  TARGETS dilated
  EXPORT dilatedTargets
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT cpp
  FILE_SET HEADERS DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT cpp)
install(
  EXPORT dilatedTargets
  NAMESPACE dilated::
  DESTINATION ${package_dir}
  COMPONENT cpp)
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/dilatedConfig.cmake.in
                              ${PROJECT_BINARY_DIR}/dilatedConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/dilatedConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(
  FILES ${PROJECT_BINARY_DIR}/dilatedConfig.cmake ${PROJECT_BINARY_DIR}/dilatedConfigVersion.cmake
  DESTINATION ${package_dir}
  COMPONENT cpp)
