//go:build mutant_lost_report

package queue

const holdsReports = false
