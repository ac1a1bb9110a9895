"""The CUDA kernels of csrc, store, gather and decode, run by the tests that run them on a GPU, on machines without one.

How. build.py makes C++ of a copy of csrc: `kernel<<<...>>>` becomes a call, dynamic shared memory an array, ptx.cuh the
file of that name in cuda/, which also gives what nvcc would. fibers.h runs the threads of a block in turns, and blocks
one after another; warp.h and copies.h have what lanes do together and what happens on its own, numbers.h rounds 16-bit
numbers as the hardware does. device.py calls the result as vllm_kivi.ops would, for tensors on the CPU, with graphs
that record calls. ../test_emulation.py runs a choice of tests, full.py all of them.

Errors name block, warp and lane. They are: lanes of a warp or threads of a block in different operations, deadlocks,
waiting for what nobody does, shuffles from lanes outside of the mask, copies and matrices that are not aligned, copies
out of dynamic shared memory and writes behind it, memory that is not there. Dynamic shared memory begins as NaN, and
copies happen as late as they may.

It cannot see
- order between blocks and between memory accesses: every write is seen at once, fences do nothing, blocks run in order;
- races that neither order of lanes shows: each lane runs alone up to the next operation of its warp;
- a fence that is missing between a thread's accesses and bulk copies (proxies);
- global memory out of bounds, unless nothing is there; a lane's own loads and stores that are not aligned;
- static shared memory that is not initialized: it holds what an earlier block left;
- registers, occupancy and time; the last bits of the hardware's exp2 and matrix products.
"""
