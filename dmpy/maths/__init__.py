"""Arithmetic on whole arrays by numpy: parity of RAID, the field GF(256). Knows of no device."""
