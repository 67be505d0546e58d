"""How accurate is the endpoint: a data set streamed through it, gated, certified against eager."""
