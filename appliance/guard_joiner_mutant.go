//go:build mutant_joiner

package appliance

const joinersWait = false
