"""Record what the clients of a framework send: `flower`, `opacus` and `flare`, each imported by itself."""
