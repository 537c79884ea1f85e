package mime

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// The stored form of a Structure. One byte of version, then unsigned varints
// (offsets as differences), strings as a length and bytes, or as a number of
// the table below. DESIGN.md describes it byte by byte.
const codecVersion = 1

// words are strings stored by number: 2*i+1, where a string of n bytes is 2*n.
// Their numbers stand on disk: append only.
var words = [...]string{"", "text", "plain", "html", "multipart", "mixed", "alternative", "related", "application",
	"octet-stream", "image", "jpeg", "png", "gif", "message", "rfc822", "7BIT", "8BIT", "BASE64", "QUOTED-PRINTABLE",
	"charset", "utf-8", "UTF-8", "us-ascii", "US-ASCII", "iso-8859-1", "boundary", "name", "filename", "attachment",
	"inline", "format", "flowed", "calendar", "signed", "report", "pdf", "BINARY", "delivery-status", "method",
	"iso-8859-2", "windows-1250", "windows-1252", "delsp", "yes", "type", "protocol", "micalg", "pkcs7-signature", "rfc822-headers", "report-type", "size"}

var wordNumbers = func() map[string]uint64 {
	m := make(map[string]uint64, len(words))
	for i, w := range words {
		m[w] = uint64(i)
	}
	return m
}()

const (
	bitCut = 1 << iota
	bitClean
)

const (
	partParams = 1 << iota
	partID
	partDescription
	partDisposition
	partLanguage
	partLocation
	partMD5
	partEnvelope
	partChildren
	partLines
)

// AppendBinary implements encoding.BinaryAppender.
func (s *Structure) AppendBinary(b []byte) ([]byte, error) {
	flags := byte(0)
	if s.Cut {
		flags |= bitCut
	}
	if s.Clean {
		flags |= bitClean
	}
	b = append(b, codecVersion, flags)
	b = binary.AppendUvarint(b, uint64(s.Received))
	b = appendEnvelope(b, &s.Envelope)
	return appendPart(b, s.Root, 0)
}

// MarshalBinary implements encoding.BinaryMarshaler.
func (s *Structure) MarshalBinary() ([]byte, error) { return s.AppendBinary(make([]byte, 0, 512)) }

func appendString(b []byte, s string) []byte {
	if n, ok := wordNumbers[s]; ok {
		return binary.AppendUvarint(b, 2*n+1)
	}
	return append(binary.AppendUvarint(b, 2*uint64(len(s))), s...)
}

func appendStrings(b []byte, l []string) []byte {
	b = binary.AppendUvarint(b, uint64(len(l)))
	for _, s := range l {
		b = appendString(b, s)
	}
	return b
}

func appendParams(b []byte, l []Param) []byte {
	b = binary.AppendUvarint(b, uint64(len(l)))
	for _, p := range l {
		b = appendString(appendString(b, p.Name), p.Value)
	}
	return b
}

func appendEnvelope(b []byte, e *Envelope) []byte {
	lists := [...][]Address{e.From, e.Sender, e.ReplyTo, e.To, e.Cc, e.Bcc}
	var flags byte
	for i, l := range lists {
		if len(l) > 0 {
			flags |= 1 << i
		}
	}
	if !e.Date.IsZero() {
		flags |= 1 << 6
	}
	b = append(b, flags)
	if !e.Date.IsZero() {
		_, offset := e.Date.Zone()
		b = binary.AppendVarint(b, e.Date.Unix())
		b = binary.AppendVarint(b, int64(offset/60))
	}
	b = appendString(b, e.Subject)
	b = appendString(b, e.MessageID)
	b = appendStrings(b, e.InReplyTo)
	for _, l := range lists {
		if len(l) == 0 {
			continue
		}
		b = binary.AppendUvarint(b, uint64(len(l)))
		for _, a := range l {
			b = appendString(appendString(appendString(b, a.Name), a.Mailbox), a.Host)
		}
	}
	return b
}

// appendPart recurses at most MaxDepth deep: only Parse makes trees.
func appendPart(b []byte, p *Part, from int64) ([]byte, error) {
	if p == nil || p.Header < from || p.Body < p.Header || p.End < p.Body {
		return nil, errors.New("encode structure: a part lies outside of its parent")
	}
	var flags uint64
	set := func(on bool, bit uint64) {
		if on {
			flags |= bit
		}
	}
	set(len(p.Params) > 0, partParams)
	set(p.ID != "", partID)
	set(p.Description != "", partDescription)
	set(p.Disposition != "", partDisposition)
	set(len(p.Language) > 0, partLanguage)
	set(p.Location != "", partLocation)
	set(p.MD5 != "", partMD5)
	set(p.Envelope != nil, partEnvelope)
	set(len(p.Children) > 0, partChildren)
	set(p.Lines != 0, partLines)
	b = binary.AppendUvarint(b, flags)
	b = binary.AppendUvarint(b, uint64(p.Header-from))
	b = binary.AppendUvarint(b, uint64(p.Body-p.Header))
	b = binary.AppendUvarint(b, uint64(p.End-p.Body))
	b = appendString(appendString(appendString(b, p.Type), p.Subtype), p.Encoding)
	if p.Lines != 0 {
		b = binary.AppendUvarint(b, uint64(p.Lines))
	}
	if len(p.Params) > 0 {
		b = appendParams(b, p.Params)
	}
	for _, s := range [...]string{p.ID, p.Description} {
		if s != "" {
			b = appendString(b, s)
		}
	}
	if p.Disposition != "" {
		b = appendParams(appendString(b, p.Disposition), p.DispParams)
	}
	if len(p.Language) > 0 {
		b = appendStrings(b, p.Language)
	}
	for _, s := range [...]string{p.Location, p.MD5} {
		if s != "" {
			b = appendString(b, s)
		}
	}
	if p.Envelope != nil {
		b = appendEnvelope(b, p.Envelope)
	}
	if len(p.Children) == 0 {
		return b, nil
	}
	b = binary.AppendUvarint(b, uint64(len(p.Children)))
	from = p.Body
	for _, c := range p.Children {
		var err error
		if b, err = appendPart(b, c, from); err != nil {
			return nil, err
		}
		from = c.Header
	}
	return b, nil
}

// ErrCodec is wrapped when bytes are no stored Structure.
var ErrCodec = errors.New("not a message structure")

// UnmarshalBinary implements encoding.BinaryUnmarshaler. It takes what Parse
// could have made and refuses trees beyond its limits. All strings of the
// result share one allocation.
func (s *Structure) UnmarshalBinary(data []byte) error {
	d := decoder{s: string(data)}
	*s = Structure{}
	d.header(s)
	d.envelope(&s.Envelope)
	s.Root = &Part{}
	d.part(s.Root, 0, 1)
	if d.bad == nil && d.pos != len(d.s) {
		d.fail("bytes behind the end")
	}
	return d.bad
}

// UnmarshalEnvelope reads only the envelope of a stored Structure.
func UnmarshalEnvelope(data []byte, e *Envelope) error {
	d := decoder{s: string(data)}
	*e = Envelope{}
	d.header(&Structure{})
	d.envelope(e)
	return d.bad
}

type decoder struct {
	s     string
	pos   int
	bad   error
	parts int
	addrs []Address
}

func (d *decoder) fail(what string) {
	if d.bad == nil {
		d.bad = fmt.Errorf("%w: %s at byte %d", ErrCodec, what, d.pos)
		d.pos = len(d.s)
	}
}

func (d *decoder) uint() uint64 {
	var v uint64
	for shift := uint(0); shift < 64; shift += 7 {
		if d.pos >= len(d.s) {
			d.fail("end too early")
			return 0
		}
		c := d.s[d.pos]
		d.pos++
		v |= uint64(c&0x7f) << shift
		if c < 0x80 {
			return v
		}
	}
	d.fail("number too large")
	return 0
}

func (d *decoder) int() int64 {
	u := d.uint()
	return int64(u>>1) ^ -int64(u&1)
}

// size reads a byte offset or length; a message is never beyond 2^48.
func (d *decoder) size() int64 {
	v := d.uint()
	if v > 1<<48 {
		d.fail("size too large")
		return 0
	}
	return int64(v)
}

// count reads a number of things, each of which takes at least one byte.
func (d *decoder) count(limit int) int {
	v := d.uint()
	if v > uint64(limit) || v > uint64(len(d.s)-d.pos) {
		d.fail("too many")
		return 0
	}
	return int(v)
}

func (d *decoder) byte() byte {
	if d.pos >= len(d.s) {
		d.fail("end too early")
		return 0
	}
	d.pos++
	return d.s[d.pos-1]
}

func (d *decoder) string() string {
	v := d.uint()
	if v&1 == 1 {
		if v/2 >= uint64(len(words)) {
			d.fail("unknown word")
			return ""
		}
		return words[v/2]
	}
	if v/2 > uint64(len(d.s)-d.pos) {
		d.fail("string too long")
		return ""
	}
	d.pos += int(v / 2)
	return d.s[d.pos-int(v/2) : d.pos]
}

func (d *decoder) strings() []string {
	n := d.count(MaxText)
	if n == 0 {
		return nil
	}
	l := make([]string, n)
	for i := range l {
		l[i] = d.string()
	}
	return l
}

func (d *decoder) params() []Param {
	n := d.count(MaxParams)
	if n == 0 {
		return nil
	}
	l := make([]Param, n)
	for i := range l {
		l[i] = Param{Name: d.string(), Value: d.string()}
	}
	return l
}

func (d *decoder) header(s *Structure) {
	if v := d.byte(); v != codecVersion && d.bad == nil {
		d.fail(fmt.Sprintf("version %d", v))
	}
	flags := d.byte()
	s.Cut, s.Clean = flags&bitCut != 0, flags&bitClean != 0
	s.Received = int(d.size())
}

func (d *decoder) envelope(e *Envelope) {
	flags := d.byte()
	if flags&(1<<6) != 0 {
		sec, zone := d.int(), d.int()
		loc := time.UTC
		if zone != 0 {
			loc = time.FixedZone("", int(zone%(48*60))*60)
		}
		e.Date = time.Unix(sec, 0).In(loc)
	}
	e.Subject = d.string()
	e.MessageID = d.string()
	e.InReplyTo = d.strings()
	for i, l := range [...]*[]Address{&e.From, &e.Sender, &e.ReplyTo, &e.To, &e.Cc, &e.Bcc} {
		if flags&(1<<i) == 0 {
			continue
		}
		n := d.count(MaxAddresses)
		if len(d.addrs) < n { // one allocation for the usual few
			d.addrs = make([]Address, max(n, 4))
		}
		*l, d.addrs = d.addrs[:n:n], d.addrs[n:]
		for j := range *l {
			(*l)[j] = Address{Name: d.string(), Mailbox: d.string(), Host: d.string()}
		}
	}
}

func (d *decoder) part(p *Part, from int64, depth int) {
	if d.parts++; d.parts > MaxParts || depth > MaxDepth {
		d.fail("tree too large")
		return
	}
	flags := d.uint()
	p.Header = from + d.size()
	p.Body = p.Header + d.size()
	p.End = p.Body + d.size()
	p.Type, p.Subtype, p.Encoding = d.string(), d.string(), d.string()
	if flags&partLines != 0 {
		p.Lines = d.size()
	}
	if flags&partParams != 0 {
		p.Params = d.params()
	}
	if flags&partID != 0 {
		p.ID = d.string()
	}
	if flags&partDescription != 0 {
		p.Description = d.string()
	}
	if flags&partDisposition != 0 {
		p.Disposition, p.DispParams = d.string(), d.params()
	}
	if flags&partLanguage != 0 {
		p.Language = d.strings()
	}
	if flags&partLocation != 0 {
		p.Location = d.string()
	}
	if flags&partMD5 != 0 {
		p.MD5 = d.string()
	}
	if flags&partEnvelope != 0 {
		p.Envelope = &Envelope{}
		d.envelope(p.Envelope)
	}
	if flags&partChildren == 0 {
		return
	}
	n := d.count(MaxParts)
	parts := make([]Part, n)
	p.Children = make([]*Part, n)
	from = p.Body
	for i := range parts {
		if d.bad != nil {
			return
		}
		p.Children[i] = &parts[i]
		d.part(&parts[i], from, depth+1)
		from = parts[i].Header
	}
}
