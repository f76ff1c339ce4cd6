# What all targets of this project have in common.

# The language and the warnings. The sources read the same with g++ 11 and later and with clang.
# No -march: instruction sets are chosen at run time.
function(cutloss_target target)
  target_compile_features(${target} PUBLIC cxx_std_20)
  set_target_properties(${target} PROPERTIES CXX_EXTENSIONS OFF)
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic>)
  if(CUTLOSS_WERROR)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
  endif()
endfunction()

# The directory of a shared library where it is not one that the loader looks in, else empty.
function(cutloss_find_run_path result target)
  set(${result} "" PARENT_SCOPE)
  get_target_property(type ${target} TYPE)
  get_target_property(file ${target} LOCATION)
  if(type STREQUAL "STATIC_LIBRARY" OR NOT file)
    return()
  endif()
  get_filename_component(directory "${file}" DIRECTORY)
  if(NOT directory IN_LIST CMAKE_CXX_IMPLICIT_LINK_DIRECTORIES)
    set(${result} "${directory}" PARENT_SCOPE)
  endif()
endfunction()

# oneDNN must share its threads with the rest: a build on TBB or SYCL fights them.
function(cutloss_require_openmp_dnnl)
  if(NOT DNNL_CPU_RUNTIME STREQUAL "OMP")
    message(FATAL_ERROR
            "cutloss needs oneDNN built for OpenMP; the one in ${dnnl_DIR} is built for "
            "'${DNNL_CPU_RUNTIME}'. Set dnnl_DIR to another, or build oneDNN with "
            "DNNL_CPU_RUNTIME=OMP.")
  endif()
endfunction()
