"""What a run costs, measured on the machine that will pay."""
