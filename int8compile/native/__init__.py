"""The libraries of native kernels: finding, building, checking, keeping and loading them.

``providers``      the choice of what computes the int8 products on a device: native kernels or the reference
``loader``         loads a library, which registers its kernels, and builds it first if need be
``libraries``      finds a library in the cache folder, or builds it
``builder``        the sources and flags of each library, and compiling it
``kernel_cache``  the cache folder of libraries, with their checksums
``trust``          checks that no other user can write to files and folders
``nvidia``         the GPUs that CUDA kernels are built for
``tuned``          the tuned table: what was measured to be faster here than the defaults
``wgmma``          Hopper's kernels, used once ``proof`` has shown that they agree with the others
``doctor``         collects what ``int8compile doctor`` prints
"""
