"""In how many architectures sites are found, merged and loaded."""
