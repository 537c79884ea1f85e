//go:build mutant_unmade_change

package appliance

const failuresAreTold = false
