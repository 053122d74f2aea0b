"""The libraries of native kernels: found, built, checked, kept and loaded.

``providers``      who computes the int8 products on a device: native kernels or the reference
``loader``         loads a library, which registers its kernels, and builds it first if need be
``libraries``      a library at hand: found where it is kept, or else built
``builder``        what each library is made of, and compiling it
``library_cache``  the folder that libraries are kept in, with their checksums
``trust``          files and folders that no other user can write to
``nvidia``         the GPUs that CUDA kernels are built for
``wgmma``          Hopper's kernels, used once ``proof`` has shown that they agree with the others
``doctor``         what ``int8compile doctor`` prints
"""
