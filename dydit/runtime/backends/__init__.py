"""What executes a bundle's subnetworks; `registry` knows them by name, `base` is what each must do."""
