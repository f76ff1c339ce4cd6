# cmake -DLIBRARY=... -DNM=... -DREADELF=... -P torch_symbols_test.cmake
#
# One binary serves every Python, and torch 2.10 and later, as long as it needs nothing but C
# functions of libtorch_cpu. It also must not bring a second OpenMP runtime into the process.
cmake_minimum_required(VERSION 3.22)

function(output_of result)
  execute_process(COMMAND ${ARGN} OUTPUT_VARIABLE output COMMAND_ERROR_IS_FATAL ANY)
  set(${result} "${output}" PARENT_SCOPE)
endfunction()

output_of(undefined ${NM} -D --undefined-only ${LIBRARY})
# Mangled names of at::, c10::, torch::, caffe2::, and anything of Python's.
string(REGEX MATCHALL "(_ZN?K?(2at|3c10|5torch|6caffe2)[A-Za-z0-9_]*|_?Py[A-Z_][A-Za-z0-9_]*)"
       unstable "${undefined}")
if(unstable)
  list(JOIN unstable "\n  " unstable)
  message(FATAL_ERROR "needs symbols outside PyTorch's stable ABI:\n  ${unstable}")
endif()
if(NOT undefined MATCHES "aoti_torch_")
  message(FATAL_ERROR "needs no aoti_torch_* symbol: is ${LIBRARY} the right file?")
endif()

output_of(defined ${NM} -D --defined-only ${LIBRARY})
if(NOT defined STREQUAL "")
  message(FATAL_ERROR "shows symbols, and should show none:\n${defined}")
endif()

output_of(dynamic ${READELF} -d ${LIBRARY})
string(REGEX MATCHALL "\\(NEEDED\\)[^\n]*" needed "${dynamic}")
foreach(name libc10 libtorch_python libtorch_cuda libpython libiomp5 libomp)
  if("${needed}" MATCHES "\\[${name}\\.")
    message(FATAL_ERROR "is linked to ${name}:\n${needed}")
  endif()
endforeach()
if(NOT "${needed}" MATCHES "\\[libgomp\\.so\\.1\\]")
  message(FATAL_ERROR "is not linked to libgomp.so.1, which torch shares:\n${needed}")
endif()
if("${dynamic}" MATCHES "R(UN)?PATH[^\n]*torch")
  message(FATAL_ERROR "has a run path to the torch it was built with:\n${dynamic}")
endif()
