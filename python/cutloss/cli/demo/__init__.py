"""The parts of cutloss demo; command.py runs them."""
