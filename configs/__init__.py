"""The shipped configs: ``orthotrain fit -c pretrain/quickstart.yaml`` finds them by relative name."""
