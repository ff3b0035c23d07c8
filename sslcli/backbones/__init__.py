"""What turns pixels into features? One file per family; timm does the work."""
