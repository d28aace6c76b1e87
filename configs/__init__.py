"""The configs that ship with the package: ``orthotrain fit -c pretrain/quickstart.yaml`` finds them by relative name."""
