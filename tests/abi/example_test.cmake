# cmake -DEXAMPLE=... -DWORK=... -DGENERATOR=... -DCONFIG=... -DPREFIX=... [-DSETTINGS=...]
#       -P example_test.cmake
#
# Builds an example against the cutloss that is installed under PREFIX.
cmake_minimum_required(VERSION 3.22)
include(${CMAKE_CURRENT_LIST_DIR}/run.cmake)
build_example(${EXAMPLE} ${WORK} ${GENERATOR} ${CONFIG} "${PREFIX}" ${SETTINGS})
