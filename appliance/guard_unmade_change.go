//go:build !mutant_unmade_change

package appliance

// failuresAreTold says that a change that no master made is not answered as
// made. The tag mutant_unmade_change takes the guard out, and the tests must
// notice.
const failuresAreTold = true
