# cmake -DPROJECT=... -DWORK=... -DGENERATOR=... -DCONFIG=... (-DBUILD=... | -DSHARED=ON|OFF)
#       [-DSETTINGS=...] -P install_test.cmake
#
# What a C++ user does: installs cutloss under a prefix of their own, from the build at hand
# (BUILD) or from one made for it (SHARED: of which kind; SETTINGS: more of CMake's), builds the
# example against it and runs it.
cmake_minimum_required(VERSION 3.22)
include(${CMAKE_CURRENT_LIST_DIR}/run.cmake)

file(REMOVE_RECURSE ${WORK})
if(NOT BUILD)
  set(BUILD ${WORK}/library)
  run(${CMAKE_COMMAND} -S ${PROJECT} -B ${BUILD} -G ${GENERATOR} -DBUILD_SHARED_LIBS=${SHARED}
      -DCUTLOSS_TESTS=OFF -DCMAKE_BUILD_TYPE=${CONFIG} ${SETTINGS})
  run(${CMAKE_COMMAND} --build ${BUILD} --parallel)
endif()
run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/prefix --component cpp)

build_example(${PROJECT}/examples/cpp_cpu ${WORK}/cpp_cpu ${GENERATOR} ${CONFIG} ${WORK}/prefix)
foreach(program successor token_loss)
  run(${WORK}/cpp_cpu/build/${program})
  message("${output}")
endforeach()
