//go:build mutant_patience

package appliance

const hearingIsProgress = false
