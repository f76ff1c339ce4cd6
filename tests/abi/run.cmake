# What the tests of this folder share.

# Runs a command; its output is in `output`, and in the message where it fails.
function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE failed OUTPUT_VARIABLE output
                  ERROR_VARIABLE output)
  if(failed)
    string(REPLACE ";" " " command "${ARGN}")
    message(FATAL_ERROR "${command}: ${failed}\n${output}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()

# Copies an example out of the tree, configures it with find_package alone (more of CMake's settings
# come last) and builds it in ${work}/build.
function(build_example folder work generator config prefix)
  get_filename_component(name ${folder} NAME)
  file(REMOVE_RECURSE ${work})
  file(COPY ${folder} DESTINATION ${work})
  run(${CMAKE_COMMAND} -S ${work}/${name} -B ${work}/build -G ${generator}
      "-DCMAKE_PREFIX_PATH=${prefix}" -DCMAKE_BUILD_TYPE=${config} ${ARGN})
  run(${CMAKE_COMMAND} --build ${work}/build)
endfunction()
