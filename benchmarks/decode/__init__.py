"""Parts of `bench_decode.py`: files, columns, timing."""
