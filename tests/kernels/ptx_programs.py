"""Small kernels in PTX, for the tests of the interpreter itself."""

from ptx.program import Program

HEADER = ".version 8.7\n.target sm_90a\n.address_size 64\n"


def program(body: str, parameters: int = 2, before: str = "", dynamic: int = 0) -> Program:
    """A kernel whose parameters p0, p1, ... are in %rd0, %rd1, ..., the thread in %r0, four and eight times it in %rd8 and %rd9."""
    declared = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    loads = "".join(f"ld.param.u64 %rd{i}, [p{i}];\n" for i in range(parameters))
    source = f"""{HEADER}{before}
.visible .entry one(
{declared.replace(", ", ",{0}").format(chr(10))}
)
{{
.reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<16>; .reg .b64 %rd<16>; .reg .f32 %f<8>; .reg .f64 %d<8>;
{loads}mov.u32 %r0, %tid.x;
mul.wide.u32 %rd8, %r0, 4;
mul.wide.u32 %rd9, %r0, 8;
{body}
ret;
}}
"""
    return Program(source, "one", dynamic)
