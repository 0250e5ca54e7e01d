"""What lies on disks: one module and one page for each format, decoding and encoding only.

Nothing here reads or writes a device. A decoder is given a view and says where it came from, so
that a FormatError can name the device and the byte; an encoder asserts what the decoder checks.
"""

__all__: list[str] = []
