//go:build mutant_no_wake

package queue

const newsWakes = false
