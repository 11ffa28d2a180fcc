# Finds nvcc, chooses architectures and enables CUDA. A macro: enable_language must run in the caller's scope.

# What a release carries: machine code for each, and PTX of the newest for chips to come.
set(RAZOR_ARCHITECTURES 80-real 86-real 89-real 90-real 100-real 120)

macro(razor_enable_cuda)
    if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
        find_program(CMAKE_CUDA_COMPILER nvcc
            HINTS "${CUDAToolkit_ROOT}/bin" ENV CUDA_HOME ENV CUDA_PATH
            PATHS "${PROJECT_SOURCE_DIR}/.venv/cuda/bin" /usr/local/cuda/bin
            PATH_SUFFIXES bin)
        if(NOT CMAKE_CUDA_COMPILER)
            message(FATAL_ERROR
                "nvcc: expected a CUDA toolkit >= 12.0, found none on PATH, in CUDAToolkit_ROOT, CUDA_HOME or /usr/local/cuda; "
                "give -DCMAKE_CUDA_COMPILER=…/nvcc, or run `make plugin`, which installs the toolchain as Python packages")
        endif()
    endif()
    if(CMAKE_CUDA_COMPILER)
        set(razor_nvcc "${CMAKE_CUDA_COMPILER}")
    else()
        set(razor_nvcc "$ENV{CUDACXX}")
    endif()

    if(NOT CMAKE_CUDA_ARCHITECTURES) # presets set it to nothing, so that none is left of an earlier call
        set(razor_archs "$ENV{CUDAARCHS}")
        if(NOT razor_archs)
            razor_supported_architectures("${razor_nvcc}" razor_archs)
        endif()
        set(CMAKE_CUDA_ARCHITECTURES "${razor_archs}" CACHE STRING "Chips to compile for" FORCE)
    endif()
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
        message(FATAL_ERROR
            "${CMAKE_CUDA_COMPILER}: expected CUDA >= 12.0, found ${CMAKE_CUDA_COMPILER_VERSION}; give -DCMAKE_CUDA_COMPILER=…/nvcc of a newer one")
    endif()
    # The runtime beside this nvcc, not another one of the machine.
    if(NOT CUDAToolkit_ROOT)
        set(CUDAToolkit_ROOT "${CMAKE_CUDA_COMPILER_TOOLKIT_ROOT}")
    endif()
    find_package(CUDAToolkit REQUIRED)
    link_directories("${CUDAToolkit_LIBRARY_DIR}") # CMake's own -L of it breaks at a space
endmacro()

# Those of RAZOR_ARCHITECTURES that nvcc knows; the last one keeps its PTX.
function(razor_supported_architectures nvcc out)
    execute_process(COMMAND "${nvcc}" --list-gpu-arch OUTPUT_VARIABLE listed ERROR_VARIABLE error RESULT_VARIABLE rc)
    if(NOT rc EQUAL 0)
        message(FATAL_ERROR "${nvcc} --list-gpu-arch: expected a list of chips, it failed: ${error}${rc}; give -DCMAKE_CUDA_ARCHITECTURES=…")
    endif()
    set(kept)
    set(dropped)
    foreach(arch IN LISTS RAZOR_ARCHITECTURES)
        string(REGEX MATCH "^[0-9]+" number "${arch}")
        if(listed MATCHES "compute_${number}[^0-9]")
            list(APPEND kept "${number}-real")
        else()
            list(APPEND dropped "${number}")
        endif()
    endforeach()
    if(NOT kept)
        message(FATAL_ERROR "${nvcc}: expected support for one of ${RAZOR_ARCHITECTURES}, found: ${listed}")
    endif()
    list(POP_BACK kept newest)
    string(REPLACE "-real" "" newest "${newest}")
    list(APPEND kept "${newest}")
    if(dropped)
        list(JOIN dropped " " names)
        message(STATUS "${nvcc} is too old for architectures ${names}: left out; PTX of ${newest} serves newer chips")
    endif()
    set(${out} "${kept}" PARENT_SCOPE)
endfunction()
