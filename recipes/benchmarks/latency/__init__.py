"""How much faster merged networks of real size are, and how far from the roofline."""
