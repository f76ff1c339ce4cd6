"""The parts of cutloss demo. cutloss/demo.py is the command."""
