# cmake -DPROJECT=... -DWORK=... -DGENERATOR=... -DCONFIG=... (-DBUILD=... | -DSHARED=ON|OFF)
#       [-DSETTINGS=...] -P install_test.cmake
#
# What a C++ user does: installs cutloss under a prefix of their own, from the build at hand
# (BUILD) or from one made for it (SHARED: of which kind; SETTINGS: more of CMake's), copies the example out of the tree,
# configures it with find_package alone, builds it and runs it.
cmake_minimum_required(VERSION 3.22)

function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE failed OUTPUT_VARIABLE output
                  ERROR_VARIABLE output)
  if(failed)
    string(REPLACE ";" " " command "${ARGN}")
    message(FATAL_ERROR "${command}: ${failed}\n${output}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()

file(REMOVE_RECURSE ${WORK})
if(NOT BUILD)
  set(BUILD ${WORK}/library)
  run(${CMAKE_COMMAND} -S ${PROJECT} -B ${BUILD} -G ${GENERATOR} -DBUILD_SHARED_LIBS=${SHARED}
      -DCUTLOSS_TESTS=OFF -DCMAKE_BUILD_TYPE=${CONFIG} ${SETTINGS})
  run(${CMAKE_COMMAND} --build ${BUILD} --parallel)
endif()
run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/prefix --component cpp)

file(COPY ${PROJECT}/examples/cpp_cpu DESTINATION ${WORK})
run(${CMAKE_COMMAND} -S ${WORK}/cpp_cpu -B ${WORK}/example -G ${GENERATOR}
    -DCMAKE_PREFIX_PATH=${WORK}/prefix -DCMAKE_BUILD_TYPE=${CONFIG})
run(${CMAKE_COMMAND} --build ${WORK}/example)
run(${WORK}/example/successor)
message("${output}")
