// Compiles a part of a file for instructions that the build's baseline lacks:
//
//   INT8COMPILE_TARGET("avx2,fma")
//   ... functions that use them, headers of such functions ...
//   INT8COMPILE_TARGET_END
//
// Include standard headers before it: none of their inline functions may be compiled for a CPU that may not be there.
//
// The tests compile such files for any machine, with an <immintrin.h> of their own that is plain C++
// (tests/helpers/emulated_isa); they define INT8COMPILE_EMULATED_ISA, and then no special target is asked for.

#pragma once

#define INT8COMPILE_PRAGMA(text) _Pragma(#text)

#if defined(INT8COMPILE_EMULATED_ISA)
#define INT8COMPILE_X86 1
#define INT8COMPILE_TARGET(features)
#define INT8COMPILE_TARGET_END
#elif !defined(__x86_64__)
#define INT8COMPILE_X86 0
#elif defined(__clang__)
#define INT8COMPILE_X86 1
#define INT8COMPILE_TARGET(features) \
  INT8COMPILE_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define INT8COMPILE_TARGET_END INT8COMPILE_PRAGMA(clang attribute pop)
#else
#define INT8COMPILE_X86 1
#define INT8COMPILE_TARGET(features) INT8COMPILE_PRAGMA(GCC push_options) INT8COMPILE_PRAGMA(GCC target(features))
#define INT8COMPILE_TARGET_END INT8COMPILE_PRAGMA(GCC pop_options)
#endif

// Whether the compiler knows AVX-VNNI and AMX, which came with the same releases.
#if INT8COMPILE_X86 && (defined(INT8COMPILE_EMULATED_ISA) || __clang_major__ >= 12 || (!__clang__ && __GNUC__ >= 11))
#define INT8COMPILE_X86_2021 1
#else
#define INT8COMPILE_X86_2021 0
#endif

#define INT8COMPILE_INLINE inline __attribute__((always_inline))
#define INT8COMPILE_INLINE_LAMBDA __attribute__((always_inline))

// Before a loop over an array of registers: unrolled early enough, the array is in registers.
#define INT8COMPILE_UNROLL _Pragma("GCC unroll 24")
