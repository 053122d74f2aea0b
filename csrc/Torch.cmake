# find_package(Torch) without what it asks for beside torch: that of a wheel for GPUs stops where the CUDA toolkit is not
# installed, which programs that use libtorch do not need. Defines the target int8compile_torch.
#
# Looks where CMAKE_PREFIX_PATH says that torch is: torch.utils.cmake_prefix_path, or the root of a libtorch.
if(TARGET int8compile_torch)
  return()
endif()
set(INT8COMPILE_TORCH_ROOTS ${CMAKE_PREFIX_PATH})
foreach(prefix ${CMAKE_PREFIX_PATH})
  list(APPEND INT8COMPILE_TORCH_ROOTS ${prefix}/../..)  # of torch/share/cmake
endforeach()
find_path(INT8COMPILE_TORCH_INCLUDE ATen/ATen.h
  PATHS ${INT8COMPILE_TORCH_ROOTS} PATH_SUFFIXES include REQUIRED NO_DEFAULT_PATH)
set(INT8COMPILE_TORCH_LIB ${INT8COMPILE_TORCH_INCLUDE}/../lib)
find_library(INT8COMPILE_C10 c10 PATHS ${INT8COMPILE_TORCH_LIB} REQUIRED NO_DEFAULT_PATH)
find_library(INT8COMPILE_TORCH_CPU torch_cpu PATHS ${INT8COMPILE_TORCH_LIB} REQUIRED NO_DEFAULT_PATH)
find_library(INT8COMPILE_TORCH torch PATHS ${INT8COMPILE_TORCH_LIB} REQUIRED NO_DEFAULT_PATH)

add_library(int8compile_torch INTERFACE)
target_include_directories(int8compile_torch SYSTEM INTERFACE
  ${INT8COMPILE_TORCH_INCLUDE} ${INT8COMPILE_TORCH_INCLUDE}/torch/csrc/api/include)
target_compile_features(int8compile_torch INTERFACE cxx_std_20)
# libtorch.so stands for all the others, torch's kernels for GPUs among them. Packages ask for it by name, and so does no
# symbol of a program's.
target_link_libraries(int8compile_torch INTERFACE
  -Wl,--no-as-needed ${INT8COMPILE_TORCH} -Wl,--as-needed ${INT8COMPILE_TORCH_CPU} ${INT8COMPILE_C10})
