"""Tells for each GGUF file named on standard input whether ggml itself can read its header.

    python tests/stubs/engine_reader.py LIBGGML_BASE < paths

A line a file: "read" or "refused". On its own because an assertion of ggml ends the process.
"""

import ctypes
import sys


class InitParams(ctypes.Structure):
    """`struct gguf_init_params`."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


def main() -> None:
    ggml = ctypes.CDLL(sys.argv[1])
    ggml.gguf_init_from_file.restype = ctypes.c_void_p
    ggml.gguf_init_from_file.argtypes = (ctypes.c_char_p, InitParams)
    ggml.gguf_free.argtypes = (ctypes.c_void_p,)
    say_nothing = LOG_CALLBACK(lambda _level, _text, _data: None)  # kept: ggml holds its address
    ggml.ggml_log_set(say_nothing, None)
    for line in sys.stdin:
        context = ggml.gguf_init_from_file(line.strip().encode(), InitParams(True, None))
        print("read" if context else "refused")
        if context:
            ggml.gguf_free(context)


if __name__ == "__main__":
    main()
