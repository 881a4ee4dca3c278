"""Where keys come from: one module a broker."""
