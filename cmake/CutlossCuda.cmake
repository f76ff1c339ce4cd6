# The CUDA engines: nvcc, the header files that it needs, and what it compiles for.
#
#   CUTLOSS_CUDA_ARCHITECTURES  what to compile for, as "80-real;90-real" (empty: the list below)
#   CUBLASLT_INCLUDE_DIR        where cublasLt.h lies (the library itself is opened at run time)
#   CUTLASS_INCLUDE_DIR         where cutlass/cutlass.h and cute/tensor.hpp lie (for sm_90 kernels)
#
# Turns CUTLOSS_CUDA off where there is no nvcc, or no cublasLt.h.
include(CheckLanguage)
if(NOT DEFINED CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(nvcc nvcc HINTS ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  mark_as_advanced(nvcc)
  if(nvcc)
    set(CMAKE_CUDA_COMPILER ${nvcc} CACHE FILEPATH "nvcc")
  endif()
endif()
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  message(STATUS "No CUDA engines: nvcc was not found (set CUDACXX, or CMAKE_CUDA_COMPILER)")
  set(CUTLOSS_CUDA OFF)
  return()
endif()

set(CUTLOSS_CUDA_ARCHITECTURES "" CACHE STRING "What the CUDA kernels are compiled for")
if(NOT CUTLOSS_CUDA_ARCHITECTURES)
  # Code for each generation that runs there, and for later ones what a driver compiles.
  set(CUTLOSS_CUDA_ARCHITECTURES "75-real;80-real;86-real;89-real;90-real;100-real;120")
endif()
# Sources differ in what they are compiled for: the flags are theirs (cutloss_add_cuda).
set(CMAKE_CUDA_ARCHITECTURES OFF)
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake before 3.26 does not know it
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
find_package(CUDAToolkit REQUIRED)

# nvidia-cublas and nvidia-cutlass are Python packages too: theirs are found where Python3 is known.
set(python_hints)
if(Python3_EXECUTABLE)
  execute_process(COMMAND ${Python3_EXECUTABLE} -c "import sysconfig as s; print(s.get_path('purelib'))"
                  OUTPUT_VARIABLE python_hints OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
find_path(CUBLASLT_INCLUDE_DIR cublasLt.h
          HINTS $ENV{CUBLASLT_ROOT}/include ${CUDAToolkit_INCLUDE_DIRS}
                ${python_hints}/nvidia/cu13/include ${python_hints}/nvidia/cublas/include)
find_path(CUTLASS_INCLUDE_DIR cutlass/cutlass.h
          HINTS $ENV{CUTLASS_ROOT}/include ${python_hints}/cutlass_library/source/include)
mark_as_advanced(CUBLASLT_INCLUDE_DIR CUTLASS_INCLUDE_DIR)
if(NOT CUBLASLT_INCLUDE_DIR)
  message(WARNING "No CUDA engines: cublasLt.h was not found. Set CUBLASLT_INCLUDE_DIR or the "
                  "environment's CUBLASLT_ROOT; CUDA's libcublas-dev and the Python package "
                  "nvidia-cublas have it. -DCUTLOSS_CUDA=OFF silences this.")
  set(CUTLOSS_CUDA OFF)
  return()
endif()

# nvcc's flags for a list like CMAKE_CUDA_ARCHITECTURES.
function(cutloss_code_flags result)
  set(flags)
  foreach(architecture ${ARGN})
    string(REGEX REPLACE "-(real|virtual)$" "" number ${architecture})
    if(architecture MATCHES "-virtual$")
      list(APPEND flags --generate-code=arch=compute_${number},code=compute_${number})
    elseif(architecture MATCHES "-real$")
      list(APPEND flags --generate-code=arch=compute_${number},code=sm_${number})
    else()
      list(APPEND flags
           --generate-code=arch=compute_${number},code=[compute_${number},sm_${number}])
    endif()
  endforeach()
  set(${result} "${flags}" PARENT_SCOPE)
endfunction()

# Tells a source what the kernels are compiled for, in words: CUTLOSS_CUDA_CODE.
function(cutloss_name_cuda_code source)
  string(REPLACE ";" " " code "${CUTLOSS_CUDA_ARCHITECTURES}")
  set_property(SOURCE ${source} APPEND PROPERTY COMPILE_DEFINITIONS "CUTLOSS_CUDA_CODE=\"${code}\"")
endfunction()

# A file for each kernel of Hopper's that is compiled with other template arguments: they compile side
# by side. Sets ${result} to their names.
function(cutloss_hopper_instances result)
  set(files "")
  foreach(element bfloat16_t half_t)
    foreach(instance "GRADIENT:GradientKind::plain" "GRADIENT:GradientKind::capped"
            "GRADIENT:GradientKind::general" "GRADIENT:GradientKind::general_capped"
            "STATISTICS:Share::columns, false" "STATISTICS:Share::columns, true"
            "STATISTICS:Share::rows, false" "STATISTICS:Share::rows, true")
      string(REGEX MATCH "^[A-Z]+" what ${instance})
      string(REGEX REPLACE "^[A-Z]+:" "" arguments ${instance})
      string(TOLOWER ${what} header)
      string(MAKE_C_IDENTIFIER "${header}_${element}_${arguments}" name)
      set(file ${PROJECT_BINARY_DIR}/hopper/${name}.cu)
      file(CONFIGURE OUTPUT ${file} CONTENT
"#include \"cuda/fused/sm90/${header}_launch.cuh\"
namespace cutloss::cuda::fused::sm90 {
CUTLOSS_${what}_INSTANCE(cute::${element}, ${arguments})
}
")
      list(APPEND files ${file})
    endforeach()
  endforeach()
  set(${result} ${files} PARENT_SCOPE)
endfunction()

# A file for each type of logits. Sets ${result} to their names.
function(cutloss_logits_instances result)
  set(files "")
  foreach(types "__nv_bfloat16, float" "__half, float" "float, float" "double, double")
    string(REGEX REPLACE "^.*, " "" stat ${types})
    string(MAKE_C_IDENTIFIER "logits_rows_${types}" name)
    set(file ${PROJECT_BINARY_DIR}/logits/${name}.cu)
    file(CONFIGURE OUTPUT ${file} CONTENT
"#include \"cuda/logits/logits_rows.cuh\"
template void cutloss::cuda::run_logit_rows<${types}>(const LogitRows<${stat}>&, int, cudaStream_t);
")
    list(APPEND files ${file})
  endforeach()
  set(${result} ${files} PARENT_SCOPE)
endfunction()

# Adds the sources of the CUDA engines to a target. The fused engine is for Hopper alone, and is
# there where its header files are and Hopper is in the list.
function(cutloss_add_cuda target)
  set(folder ${PROJECT_SOURCE_DIR}/src/cuda)
  file(GLOB sources CONFIGURE_DEPENDS ${folder}/*.cpp ${folder}/rows/*.cpp
       ${folder}/logits/*.cpp ${folder}/library/*.cpp)
  file(GLOB kernels CONFIGURE_DEPENDS ${folder}/rows/*.cu ${folder}/library/*.cu)
  cutloss_logits_instances(logits_instances)
  list(APPEND kernels ${logits_instances})
  file(GLOB hopper_kernels CONFIGURE_DEPENDS ${folder}/fused/*.cu ${folder}/fused/sm90/*.cu)
  file(GLOB hopper_sources CONFIGURE_DEPENDS ${folder}/fused/*.cpp ${folder}/fused/sm90/*.cpp)

  cutloss_code_flags(flags ${CUTLOSS_CUDA_ARCHITECTURES})
  set_source_files_properties(${kernels} PROPERTIES COMPILE_OPTIONS "${flags}")
  target_compile_definitions(${target} PUBLIC CUTLOSS_CUDA)
  cutloss_name_cuda_code(${folder}/device.cpp)

  set(for_hopper ${CUTLOSS_CUDA_ARCHITECTURES})
  list(FILTER for_hopper INCLUDE REGEX "^90")
  if(for_hopper AND CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.5)
    message(FATAL_ERROR "Hopper's kernels need CUDA 12.5 or newer, and ${CMAKE_CUDA_COMPILER} is of "
                        "${CMAKE_CUDA_COMPILER_VERSION}: set CUDACXX to a newer nvcc, or leave 90 out of "
                        "CUTLOSS_CUDA_ARCHITECTURES (${CUTLOSS_CUDA_ARCHITECTURES}).")
  endif()
  if(for_hopper AND hopper_kernels)
    if(CUTLASS_INCLUDE_DIR)
      cutloss_hopper_instances(instances)
      list(APPEND hopper_kernels ${instances})
      cutloss_code_flags(flags 90a-real)
      set_source_files_properties(${hopper_kernels} PROPERTIES COMPILE_OPTIONS "${flags}")
      list(APPEND sources ${hopper_sources})
      list(APPEND kernels ${hopper_kernels})
      target_compile_definitions(${target} PUBLIC CUTLOSS_CUDA_SM90)
      target_include_directories(${target} SYSTEM PRIVATE ${CUTLASS_INCLUDE_DIR})
    else()
      message(WARNING "No fused kernels for Hopper: CUTLASS's header files were not found. Set "
                      "CUTLASS_INCLUDE_DIR or the environment's CUTLASS_ROOT; the Python package "
                      "nvidia-cutlass has them.")
    endif()
  endif()

  target_sources(${target} PRIVATE ${sources} ${kernels})
  set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES OFF CUDA_STANDARD 20
                                             CUDA_STANDARD_REQUIRED ON)
  target_compile_options(
    ${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr;-Xcompiler=-Wall,-Wextra>")
  if(CUTLOSS_WERROR)
    target_compile_options(${target} PRIVATE
                           "$<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings;-Xcompiler=-Werror>")
  endif()
  target_include_directories(${target} SYSTEM PRIVATE ${CUBLASLT_INCLUDE_DIR}
                                                      ${CUDAToolkit_INCLUDE_DIRS})
  # The runtime comes along, so that any driver's machine, and one without, can load the library.
  target_link_libraries(${target} PUBLIC CUDA::cudart_static)
endfunction()
