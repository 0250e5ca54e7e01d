"""Target families, one file each; `dmpy.target.find_target()` finds them by their names."""
