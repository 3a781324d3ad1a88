"""Drop-in use of the operators in other libraries; each module imports its library only when it is called."""
