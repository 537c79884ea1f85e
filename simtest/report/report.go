// Package report makes one page of a Record: self-contained HTML with drawings
// in SVG, no scripts, for light and dark screens.
//
// It is pure: a Record in, HTML out.
package report

import (
	"io"

	"posthouse/simtest/record"
)

// Write writes the page.
func Write(w io.Writer, r *record.Record) error { return nil }

// Sentence says in plain words what happened to the mail.
func Sentence(r *record.Record) string { return "" }
