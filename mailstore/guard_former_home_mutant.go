//go:build mutant_former_home

package mailstore

const homeOnly = false
