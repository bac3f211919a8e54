"""PTX, run on a CPU: what a compiler made of a kernel, and not the kernel's source.

`text` reads an entry of a PTX file; `program` decodes each of its instructions once, with `opcodes`, `arithmetic`, `conversions` and
`movement`; `memory` has buffers with guarded ends; `races` knows what orders two accesses, and of two that nothing does; `running` takes
the warps of a cluster of blocks through the code in a random order.

Chapters and sections are those of NVIDIA's "PTX ISA", version 9.0. What is modelled: 32 lanes of a warp that diverge and meet again as
threads do since sm_70 (any group of lanes that stand at one instruction may go on; barriers and shuffles wait for the lanes they name),
IEEE arithmetic with the rounding that is written, misaligned and outside accesses as errors. What is not: ptxas, which turns PTX into
machine code; caches and the weak order of memory, where another thread's store is seen late (a race is reported instead); time.
What an instruction leaves to the hardware within a bound (ex2.approx, div.full, ...) is exact here and rounded, or off by as much as its
bound allows where `inexact` is given. An instruction that is not known is an error that names its line.
"""
