"""Compiler passes, one file each; imported as `bdlora_compile.passes`."""
