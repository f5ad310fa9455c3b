"""Model families: each folder holds one family's config, modules, cached decoding and tensor names."""
