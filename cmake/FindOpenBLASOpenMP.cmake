# Finds OpenBLAS built for OpenMP, so that its threads are the ones everybody else uses, and
# defines the target OpenBLAS::OpenMP. Debian and Ubuntu keep that build in a directory of its
# own; Fedora names it libopenblaso. Another one can be given by OpenBLAS_LIBRARY and
# OpenBLAS_INCLUDE_DIR.
#
# OpenBLAS_RPATH is the library's directory where it is not one that the loader looks in: on
# Debian libopenblas.so.0 alone is a link that may lead to the pthread build.
set(debian_name ${CMAKE_LIBRARY_ARCHITECTURE}/openblas-openmp)
find_library(OpenBLAS_LIBRARY NAMES openblas PATHS /usr/lib/${debian_name} NO_DEFAULT_PATH)
find_library(OpenBLAS_LIBRARY NAMES openblaso)
find_path(OpenBLAS_INCLUDE_DIR NAMES cblas.h PATHS /usr/include/${debian_name} NO_DEFAULT_PATH)
find_path(OpenBLAS_INCLUDE_DIR NAMES cblas.h PATH_SUFFIXES openblas)
mark_as_advanced(OpenBLAS_LIBRARY OpenBLAS_INCLUDE_DIR)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  OpenBLASOpenMP
  REQUIRED_VARS OpenBLAS_LIBRARY OpenBLAS_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "the OpenMP build of OpenBLAS is needed: libopenblas-openmp-dev on \
Debian and Ubuntu, or set OpenBLAS_LIBRARY and OpenBLAS_INCLUDE_DIR")

if(OpenBLASOpenMP_FOUND)
  get_filename_component(OpenBLAS_RPATH "${OpenBLAS_LIBRARY}" DIRECTORY)
  if(OpenBLAS_RPATH IN_LIST CMAKE_CXX_IMPLICIT_LINK_DIRECTORIES)
    set(OpenBLAS_RPATH "")
  endif()
  if(NOT TARGET OpenBLAS::OpenMP)
    add_library(OpenBLAS::OpenMP UNKNOWN IMPORTED)
    set_target_properties(OpenBLAS::OpenMP PROPERTIES
                          IMPORTED_LOCATION "${OpenBLAS_LIBRARY}"
                          INTERFACE_INCLUDE_DIRECTORIES "${OpenBLAS_INCLUDE_DIR}")
  endif()
endif()
