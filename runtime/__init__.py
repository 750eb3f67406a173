"""What runs beside the compiled graph: shards, adapter banks, caches; imported as `bdlora_compile.runtime`."""
