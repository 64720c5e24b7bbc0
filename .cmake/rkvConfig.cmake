# find_package(rkv 0.2) reads this file where `make install` has put it; add_subdirectory reads it
# here. All paths follow from the place of this file, so the installed tree may be moved.
#
#   rkv::rkv         the include directory of rkv.h, and libm where there is one
#   rkv_CUDA_SOURCE  path of rkv_cuda.cu, for those who compile it in a way of their own
#   rkv::cuda        rkv::rkv, and rkv_cuda.cu as a source of the target that links it. Link it
#                    PRIVATE, to one target of a program, in a project with the language CUDA.
set(rkv_INCLUDE_DIR "${CMAKE_CURRENT_LIST_DIR}/..")
if(NOT EXISTS "${rkv_INCLUDE_DIR}/rkv.h")
    set(rkv_INCLUDE_DIR "${CMAKE_CURRENT_LIST_DIR}/../../../include")
endif()
get_filename_component(rkv_INCLUDE_DIR "${rkv_INCLUDE_DIR}" ABSOLUTE)
set(rkv_CUDA_SOURCE "${rkv_INCLUDE_DIR}/rkv_cuda.cu")

if(NOT TARGET rkv::rkv)
    add_library(rkv::rkv INTERFACE IMPORTED ${rkv_VISIBILITY})
    target_include_directories(rkv::rkv INTERFACE "${rkv_INCLUDE_DIR}")
    if(NOT WIN32 OR MINGW)
        target_link_libraries(rkv::rkv INTERFACE m)
    endif()

    add_library(rkv::cuda INTERFACE IMPORTED ${rkv_VISIBILITY})
    target_sources(rkv::cuda INTERFACE "${rkv_CUDA_SOURCE}")
    target_compile_features(rkv::cuda INTERFACE cuda_std_14)
    target_link_libraries(rkv::cuda INTERFACE rkv::rkv)
endif()
