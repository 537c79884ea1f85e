package imapd

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/emersion/go-imap/v2"
	"github.com/emersion/go-imap/v2/imapserver"

	"posthouse/mailstore"
	"posthouse/mailstore/mime"
	"posthouse/transport"
)

// maxKeys bounds one SEARCH: each key costs on each message.
const maxKeys = 500

// Search implements imapserver.Session.
func (s *session) Search(kind imapserver.NumKind, c *imap.SearchCriteria, opt *imap.SearchOptions) (*imap.SearchData, error) {
	found, err := s.search(c)
	if opt.ReturnSave {
		s.saved = nil // RFC 5182 section 2.1: also when the search fails
	}
	if err != nil {
		return nil, err
	}
	d := &imap.SearchData{Count: uint32(len(found))}
	number := func(at int) uint32 {
		if kind == imapserver.NumKindUID {
			return uint32(s.view.uids[at])
		}
		return uint32(at + 1)
	}
	if n := len(found); n > 0 {
		d.Min, d.Max = number(found[0]), number(found[n-1])
	}
	if kind == imapserver.NumKindUID {
		d.All = uidSet(s.view.at(found))
	} else {
		set := imap.SeqSet{}
		for _, at := range found {
			if n := len(set); n > 0 && set[n-1].Stop == uint32(at) {
				set[n-1].Stop++
			} else {
				set = append(set, imap.SeqRange{Start: uint32(at + 1), Stop: uint32(at + 1)})
			}
		}
		d.All = set
	}
	if opt.ReturnSave {
		switch n := len(found); { // RFC 5182 section 2.4: what MIN and MAX alone save
		case n > 0 && (opt.ReturnMin || opt.ReturnMax) && !opt.ReturnAll && !opt.ReturnCount:
			if opt.ReturnMin {
				s.saved = append(s.saved, s.view.uids[found[0]])
			}
			if opt.ReturnMax && (n > 1 || !opt.ReturnMin) {
				s.saved = append(s.saved, s.view.uids[found[n-1]])
			}
		default:
			s.saved = s.view.at(found)
		}
	}
	return d, nil
}

func (s *session) search(c *imap.SearchCriteria) ([]int, error) {
	q, err := s.compile(c, new(int))
	if err != nil {
		return nil, err
	}
	_, infos, err := s.view.folder.List()
	if err != nil {
		return nil, s.failure("search", err)
	}
	var found []int
	next := 0
	for i := range infos {
		for next < len(s.view.uids) && s.view.uids[next] < infos[i].UID {
			next++ // expunged, not told yet: it matches nothing
		}
		if next == len(s.view.uids) {
			break
		}
		if s.view.uids[next] != infos[i].UID {
			continue
		}
		cand := candidate{s: s, at: next, info: &infos[i]}
		ok, err := q.match(&cand)
		cand.close()
		if errors.Is(err, mailstore.ErrExpunged) {
			continue
		}
		if err != nil {
			return nil, s.failure("search", err)
		}
		if ok {
			found = append(found, next)
		}
		if s.ctx.Err() != nil {
			return nil, s.ctx.Err()
		}
	}
	return found, nil
}

// query is a compiled SearchCriteria: all of it must match.
type query struct {
	sets          [][]span
	flags, absent []mailstore.Flag
	never         bool // \Recent, which no message here has
	since, before time.Time
	sentSince     time.Time
	sentBefore    time.Time
	larger        int64
	smaller       int64
	header        []headerKey
	body, text    [][]byte
	not           []*query
	or            [][2]*query
}

type headerKey struct {
	name  string
	value string // lower case
}

func (s *session) compile(c *imap.SearchCriteria, keys *int) (*query, error) {
	*keys += 1 + len(c.SeqNum) + len(c.UID) + len(c.Header) + len(c.Body) + len(c.Text) + len(c.Flag) + len(c.NotFlag)
	if *keys > maxKeys {
		return nil, no(imap.ResponseCodeLimit, "Too many search keys")
	}
	q := &query{since: c.Since, before: c.Before, sentSince: c.SentSince, sentBefore: c.SentBefore, larger: c.Larger, smaller: c.Smaller}
	for _, set := range c.SeqNum {
		sp, err := s.spans(set)
		if err != nil {
			return nil, err
		}
		q.sets = append(q.sets, sp)
	}
	for _, set := range c.UID {
		sp, err := s.spans(set)
		if err != nil {
			return nil, err
		}
		q.sets = append(q.sets, sp)
	}
	for _, f := range c.Flag {
		q.never = q.never || strings.EqualFold(string(f), `\Recent`)
		q.flags = append(q.flags, mailstore.Flag(f))
	}
	for _, f := range c.NotFlag {
		if !strings.EqualFold(string(f), `\Recent`) {
			q.absent = append(q.absent, mailstore.Flag(f))
		}
	}
	for _, h := range c.Header {
		q.header = append(q.header, headerKey{strings.ToLower(h.Key), strings.ToLower(h.Value)})
	}
	for _, t := range c.Body {
		q.body = append(q.body, bytes.ToLower([]byte(t)))
	}
	for _, t := range c.Text {
		q.text = append(q.text, bytes.ToLower([]byte(t)))
	}
	for i := range c.Not {
		n, err := s.compile(&c.Not[i], keys)
		if err != nil {
			return nil, err
		}
		q.not = append(q.not, n)
	}
	for i := range c.Or {
		a, err := s.compile(&c.Or[i][0], keys)
		if err != nil {
			return nil, err
		}
		b, err := s.compile(&c.Or[i][1], keys)
		if err != nil {
			return nil, err
		}
		q.or = append(q.or, [2]*query{a, b})
	}
	return q, nil
}

// match asks cheap keys first. Its depth is bounded by maxKeys.
func (q *query) match(c *candidate) (bool, error) {
	if q.never {
		return false, nil
	}
	for _, set := range q.sets {
		i, _ := slices.BinarySearchFunc(set, c.at, func(sp span, at int) int { return sp.last - at })
		if i == len(set) || set[i].first > c.at {
			return false, nil
		}
	}
	for _, f := range q.flags {
		if !hasFlag(c.info.Flags, f) {
			return false, nil
		}
	}
	for _, f := range q.absent {
		if hasFlag(c.info.Flags, f) {
			return false, nil
		}
	}
	if q.larger > 0 && c.info.Size <= q.larger || q.smaller > 0 && c.info.Size >= q.smaller || !inDays(c.info.Received, q.since, q.before) {
		return false, nil
	}
	for _, n := range q.not { // without bodies if that is enough
		if !n.dear() {
			if ok, err := n.match(c); ok || err != nil {
				return false, err
			}
		}
	}
	if !q.sentSince.IsZero() || !q.sentBefore.IsZero() {
		if err := c.load(); err != nil {
			return false, err
		}
		if d := c.msg.Structure.Envelope.Date; d.IsZero() || !inDays(d, q.sentSince, q.sentBefore) {
			return false, nil
		}
	}
	for _, h := range q.header {
		if ok, err := c.header(h); !ok || err != nil {
			return false, err
		}
	}
	for _, o := range q.or {
		ok, err := o[0].match(c)
		if err == nil && !ok {
			ok, err = o[1].match(c)
		}
		if !ok || err != nil {
			return false, err
		}
	}
	for _, n := range q.not {
		if n.dear() {
			if ok, err := n.match(c); ok || err != nil {
				return false, err
			}
		}
	}
	for _, t := range q.text {
		if ok, err := c.text(t, true); !ok || err != nil {
			return false, err
		}
	}
	for _, t := range q.body {
		if ok, err := c.text(t, false); !ok || err != nil {
			return false, err
		}
	}
	return true, nil
}

func (q *query) dear() bool {
	return len(q.header)+len(q.body)+len(q.text)+len(q.or)+len(q.not) > 0 || !q.sentSince.IsZero() || !q.sentBefore.IsZero()
}

// inDays compares days only, each time in its own zone (RFC 9051 section 6.4.4).
func inDays(t, since, before time.Time) bool {
	y, m, d := t.Date()
	day := time.Date(y, m, d, 0, 0, 0, 0, time.UTC)
	return (since.IsZero() || !day.Before(since)) && (before.IsZero() || day.Before(before))
}

// candidate is a message that is being asked; what keys need is read once.
type candidate struct {
	s     *session
	at    int
	info  *mailstore.Info
	msg   *mailstore.Message
	body  transport.BodyReader
	block []byte // the header
}

func (c *candidate) load() (err error) {
	if c.msg == nil {
		c.msg, err = c.s.view.folder.Message(c.info.UID)
	}
	return err
}

func (c *candidate) open() (err error) {
	if err = c.load(); err == nil && c.body == nil {
		c.body, err = c.msg.Body.Open()
	}
	return err
}

func (c *candidate) close() {
	if c.body != nil {
		c.body.Close()
	}
}

func (c *candidate) readHeader() error {
	if c.block != nil {
		return nil
	}
	if err := c.open(); err != nil {
		return err
	}
	root := c.msg.Structure.Root
	c.block = make([]byte, min(root.Body-root.Header, mime.MaxHeaderSize))
	_, err := io.ReadFull(io.NewSectionReader(c.body, root.Header, int64(len(c.block))), c.block)
	return err
}

// header looks for text in a field. What the envelope has is not read again.
func (c *candidate) header(k headerKey) (bool, error) {
	if err := c.load(); err != nil {
		return false, err
	}
	if st := c.msg.Structure; k.value != "" && !st.Cut {
		e := &st.Envelope
		switch k.name {
		case "subject":
			return containsFold(e.Subject, k.value), nil
		case "from":
			return addressesContain(e.From, k.value), nil
		case "to":
			return addressesContain(e.To, k.value), nil
		case "cc":
			return addressesContain(e.Cc, k.value), nil
		case "bcc":
			return addressesContain(e.Bcc, k.value), nil
		}
	}
	if err := c.readHeader(); err != nil {
		return false, err
	}
	for f := range mime.Fields(c.block) {
		if f.Is(k.name) && (k.value == "" || containsFold(mime.DecodeText(f.Value), k.value)) {
			return true, nil
		}
	}
	return false, nil
}

func addressesContain(l []mime.Address, low string) bool {
	for i := range l {
		a := &l[i]
		s := a.Mailbox
		if a.Host != "" && a.Host != mime.MissingDomain {
			s += "@" + a.Host
		}
		if a.Name != "" {
			s = a.Name + " <" + s + ">"
		}
		if containsFold(s, low) {
			return true
		}
	}
	return false
}

func containsFold(s, low string) bool { return strings.Contains(strings.ToLower(s), low) }

// text looks for lower-case text in the text parts, and in the header if asked.
func (c *candidate) text(low []byte, header bool) (bool, error) {
	if len(low) == 0 {
		return true, nil
	}
	if err := c.open(); err != nil {
		return false, err
	}
	if header {
		if err := c.readHeader(); err != nil {
			return false, err
		}
		for f := range mime.Fields(c.block) {
			if containsFold(string(f.Name)+": "+mime.DecodeText(f.Value), string(low)) {
				return true, nil
			}
		}
	}
	return c.textIn(c.msg.Structure.Root, low)
}

func (c *candidate) textIn(p *mime.Part, low []byte) (bool, error) {
	for _, child := range p.Children { // at most mime.MaxDepth deep
		if ok, err := c.textIn(child, low); ok || err != nil {
			return ok, err
		}
	}
	if len(p.Children) > 0 || p.Type != "text" {
		return false, nil
	}
	if c.s.buffer == nil {
		c.s.buffer = make([]byte, outputBuffer)
	}
	return streamContains(p.Text(io.NewSectionReader(c.body, p.Body, p.End-p.Body)), low, c.s.buffer)
}

// streamContains looks for low in the lower-case text of r, through buf. A
// character or a match may lie across two reads.
func streamContains(r io.Reader, low, buf []byte) (bool, error) {
	var tail []byte // lower case, shorter than low, or an unfinished character behind it
	n := 0          // bytes in buf
	for {
		m, err := r.Read(buf[n:])
		n += m
		whole := n
		if err == nil {
			for i := 1; i <= min(utf8.UTFMax, n); i++ { // keep an unfinished character
				if c := buf[n-i]; utf8.RuneStart(c) {
					if !utf8.FullRune(buf[n-i : n]) {
						whole = n - i
					}
					break
				}
			}
		}
		if whole > 0 {
			tail = appendLower(tail, buf[:whole])
			if bytes.Contains(tail, low) {
				return true, nil
			}
			if keep := len(low) - 1; len(tail) > keep {
				tail = append(tail[:0], tail[len(tail)-keep:]...)
			}
			n = copy(buf, buf[whole:n])
		}
		if err == io.EOF {
			return false, nil
		}
		if err != nil {
			return false, err
		}
	}
}

// appendLower appends the lower case of b, without an allocation for what is
// ASCII.
func appendLower(dst, b []byte) []byte {
	at := len(dst)
	dst = append(dst, b...)
	for i, c := range dst[at:] {
		switch {
		case c >= utf8.RuneSelf:
			return append(dst[:at+i], bytes.ToLower(b[i:])...)
		case 'A' <= c && c <= 'Z':
			dst[at+i] = c + ('a' - 'A')
		}
	}
	return dst
}
